//! Dates as text, for chat templates and statistics: the directives of C's `strftime` that templates use, in UTC and English.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const DAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `format` with its directives replaced; `unix` are seconds since 1970.
///
/// # Errors
/// A sentence, if a directive is unknown.
pub fn strftime(format: &str, unix: u64) -> Result<String, String> {
    let (days, second) = (unix / 86_400, unix % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days % 7) as usize];
    let mut out = String::with_capacity(format.len() + 8);
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = rest.next();
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{:02}", second % 60),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('%') => "%".to_owned(),
            Some(other) => return Err(format!("`strftime_now` does not know `%{other}`")),
            None => return Err("`strftime_now`'s format ends in a bare `%`".to_owned()),
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Year, month and day of a day counted from 1970, by eras of 400 years that begin on 1 March.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_follow_the_calendar() {
        for (unix, text) in [
            (0, "1970-01-01 00:00:00 Thursday"),
            (951_782_400, "2000-02-29 00:00:00 Tuesday"),
            (1_709_164_799, "2024-02-28 23:59:59 Wednesday"),
            (4_107_542_400, "2100-03-01 00:00:00 Monday"),
        ] {
            assert_eq!(strftime("%F %T %A", unix).unwrap(), text);
        }
        assert_eq!(
            strftime("%a %d %b %y %I%p %B 100%%", 43_200).unwrap(),
            "Thu 01 Jan 70 12PM January 100%"
        );
    }

    #[test]
    fn unknown_directives_are_named() {
        assert!(strftime("%Q", 0).unwrap_err().contains("%Q"));
        assert!(strftime("x%", 0).is_err());
    }
}
