"""The training loop, optimizers, schedules, and how a run begins and resumes."""
