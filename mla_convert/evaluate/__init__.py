"""Quality and speed of a converted model against its original, and the gate over both."""
