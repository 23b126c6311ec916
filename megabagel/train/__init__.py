"""The training loop: step, losses, optimizer, schedules, telemetry."""
