"""Scripts that measure the library and train the models that ship with it."""
