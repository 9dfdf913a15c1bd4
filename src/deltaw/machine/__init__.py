"""What the machine is: processor, memory limits, devices, and what is chosen for it."""
