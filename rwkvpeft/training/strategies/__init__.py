"""How the processes of a run share its numbers: whole copies, FSDP, DeepSpeed."""
