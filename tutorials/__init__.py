"""The notebooks, and the Vision Mamba that they and the tests share."""
