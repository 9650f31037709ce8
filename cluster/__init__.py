"""Ready configurations for `pavi-scale fit STUDY.yaml --cluster FILE.yaml`."""
