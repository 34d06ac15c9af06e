"""Training: a trainer that divides both losses by the targets of the whole step, recipes, and instruction tuning."""
