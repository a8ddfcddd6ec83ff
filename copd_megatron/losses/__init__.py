"""Losses and their weights: functions of tensors that know no configuration and issue no collective."""
