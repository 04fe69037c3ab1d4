"""What a run, a data set or a machine is like: nothing here changes one."""
