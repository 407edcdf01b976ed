"""What a paper's experiment needs: data, Flax networks, training loop, tables and pictures.

`python -m benchmarks` compares the methods, `python -m benchmarks cost` weighs one step of each.
"""
