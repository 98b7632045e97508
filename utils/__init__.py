"""Code that the scripts share: mathematics without side effects, and input and output in modules of their own."""
