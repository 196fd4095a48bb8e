"""From a bundle and a patient's files to an answer, what it rests on, and a page that shows it."""
