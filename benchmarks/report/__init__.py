"""Reports of results: tables, targets, figures and pages."""
