"""How a step runs on all devices, and how the processes of a job communicate."""
