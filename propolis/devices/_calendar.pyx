"""Dates without the C library's: gmtime looks for time zone files, which a jailed worker cannot open."""

cdef enum:
    DAY = 86400
    FIRST_YEAR = 1970
    LAST_YEAR = 9999

cdef int64_t LAST_SECOND = 253402300799  # 9999-12-31 23:59:59
cdef int64_t *DAYS_BEFORE_MONTH = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334, 365]


cdef bint is_leap(int64_t year) noexcept nogil:
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


cdef int64_t days_before_year(int64_t year) noexcept nogil:
    """Days from the start of 1970 to that of `year`, which is not earlier; the leap years between are counted."""
    return 365 * (year - FIRST_YEAR) + (year - 1969) // 4 - (year - 1901) // 100 + (year - 1601) // 400


cdef int64_t days_before_month(int64_t year, int64_t month) noexcept nogil:
    return DAYS_BEFORE_MONTH[month - 1] + (1 if month > 2 and is_leap(year) else 0)


cdef Date date_of(int64_t seconds) noexcept nogil:
    cdef Date date
    cdef int64_t days, second
    seconds = max(0, min(seconds, LAST_SECOND))
    days = seconds // DAY
    second = seconds % DAY
    date.year = FIRST_YEAR + days // 366  # never late, and early by a few years at most
    while days_before_year(date.year + 1) <= days:
        date.year += 1
    days -= days_before_year(date.year)
    date.month = 1
    while date.month < 12 and days_before_month(date.year, date.month + 1) <= days:
        date.month += 1
    date.day = days - days_before_month(date.year, date.month) + 1
    date.weekday = (seconds // DAY + 4) % 7 + 1  # 1970 began on a Thursday
    date.hour = second // 3600
    date.minute = second // 60 % 60
    date.second = second % 60
    return date


cdef int64_t seconds_of(const Date *date) noexcept nogil:
    cdef int64_t year = date.year
    cdef int64_t month = date.month
    cdef int64_t days
    if month < 1:
        month = 1
    year += (month - 1) // 12
    month = (month - 1) % 12 + 1
    year = max(FIRST_YEAR, min(year, LAST_YEAR))
    days = days_before_year(year) + days_before_month(year, month) + date.day - 1
    return max(0, min(LAST_SECOND, ((days * 24 + date.hour) * 60 + date.minute) * 60 + date.second))


def date(seconds: int) -> tuple:
    """(year, month, day, weekday, hour, minute, second)."""
    cdef Date found = date_of(seconds)
    return found.year, found.month, found.day, found.weekday, found.hour, found.minute, found.second


def seconds(year: int, month: int, day: int, hour: int, minute: int, second: int) -> int:
    """Since 1970, of a date whose fields may lie beyond their range."""
    cdef Date given = Date(year=year, month=month, day=day, weekday=0, hour=hour, minute=minute, second=second)
    return seconds_of(&given)
