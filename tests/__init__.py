"""The tests of captum_ssm: laws, oracles written as plain loops, and the tiny models they run on."""
