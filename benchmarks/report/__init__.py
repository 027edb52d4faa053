"""What is made of results: tables, targets, figures and pages."""
