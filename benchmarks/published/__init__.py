"""The cost model beside what others have measured and published."""
