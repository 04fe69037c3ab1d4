"""How a step meets the devices, and the processes of a job each other."""
