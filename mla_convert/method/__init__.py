"""The method: calibrate, factorise, refine."""
