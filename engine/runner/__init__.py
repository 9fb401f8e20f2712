"""Runs step plans on tensors: batch, runner, sampler."""
