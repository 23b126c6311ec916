"""Flow sampling as pure functions of a velocity: timestep grid, Euler step, guidance, TaylorSeer."""
