"""Training loop: step, losses, optimizer, schedules, telemetry."""
