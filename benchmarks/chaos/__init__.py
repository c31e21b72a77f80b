"""What a study, a checkpoint or a worker may meet: each command here does harm on purpose."""
