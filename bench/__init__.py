"""What trilby gains over PyTorch on this machine, measured side by side in one run: `python -m trilby.bench`."""
