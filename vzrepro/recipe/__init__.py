"""What is to be built: recipes, their evaluation to a graph of derivations, the lock, and the plan."""
