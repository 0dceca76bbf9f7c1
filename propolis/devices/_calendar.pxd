"""Dates of the proleptic Gregorian calendar, in UTC, from 1970 to 9999."""

from libc.stdint cimport int64_t

cdef struct Date:
    int64_t year
    int64_t month    # 1 to 12
    int64_t day      # 1 to 31
    int64_t weekday  # 1 to 7, 1 is Sunday
    int64_t hour
    int64_t minute
    int64_t second

# Both take anything: a time before 1970 or after 9999 is the nearest one within, a field beyond its range carries.
cdef Date date_of(int64_t seconds) noexcept nogil
cdef int64_t seconds_of(const Date *date) noexcept nogil
