"""Studies to run, read and copy: each a model, a function that makes its cohort, and a study file for the command line."""
