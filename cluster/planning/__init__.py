"""What a run would take: arithmetic on a model's shape, a run's work and the machines."""
