"""The benchmarks of captum_ssm: speed as ratios, and the methods measured against each other."""
