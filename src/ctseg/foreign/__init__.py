"""Pipelines of others (MMARs, MONAI bundles) read as data: their numbers become a recipe, nothing of them is run."""
