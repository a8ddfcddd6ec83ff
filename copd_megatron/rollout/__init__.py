"""Rollout: completions sampled from experts, with their log-probs, turn by turn."""
