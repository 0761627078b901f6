"""The tests of the layers of mamba_ssm and flash-linear-attention, run in an environment that has both."""
