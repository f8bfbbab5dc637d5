"""What people look at: reports of a run, comparisons, pictures. Modules are imported one by one, as they are needed."""
