"""Ground: types, scalars, trees, matrices and running averages. Knows nothing of models."""
