"""A model as eckart sees it: its blocks, its linear maps, and the walk through them."""
