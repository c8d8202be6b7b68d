"""The diffusion process: schedule, forward process, parameterisations, samplers, guidance."""
