"""From decompositions to a plan that meets a goal."""
