from slimlm.cli import leave

if __name__ == "__main__":
    leave()
