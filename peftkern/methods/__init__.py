"""Built-in methods, one file each; registered as entry points like everybody else's."""
