"""Saves, exports and imports: Megatron's distributed checkpoints, PEFT folders, Hugging Face directories."""
