"""`python -m pipelines.bench`."""

from pipelines import common

if __name__ == "__main__":
    common.start("pipelines.bench.command")
