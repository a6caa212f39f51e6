"""The method: selection, rollouts, rewards, GRPO and the training step, one idea a file."""
