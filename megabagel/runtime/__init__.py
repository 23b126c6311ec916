"""Processes of a job: launching, rendezvous, heartbeat, phases, signals, and megatron-core on a CPU."""
