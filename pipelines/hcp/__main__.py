"""`python -m pipelines.hcp`."""

from pipelines import common

if __name__ == "__main__":
    common.start("pipelines.hcp.command")
