"""What the studies share: tasks, methods, training, tuning, kept measurements, statistics, tables, pictures."""
