"""What every part of the package stands on: errors and files. It imports nothing of ours."""
