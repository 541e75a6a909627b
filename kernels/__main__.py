"""`python -m trilby.kernels`: what runs where on this machine, and why."""

from .doctor import report

print(report())
