"""What a run leaves behind, and the test of one."""
