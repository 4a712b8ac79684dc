//! `reference/errors.md` against the one table of error codes.

use baton_shared::wire::error::{ErrorCode, Remedy, remedy};

use crate::page::{self, code};

fn words(remedy: Remedy) -> &'static str {
    match remedy {
        Remedy::PassThrough => "hands it on",
        Remedy::NewContextPass => "computes the prompt again",
        Remedy::NewContextPassElsewhere => "computes it again elsewhere",
        Remedy::AnotherServer => "asks another server",
        Remedy::AnotherServerBlame => "asks another server, counts against this one",
        Remedy::GiveUp => "gives up: 502",
    }
}

#[test]
fn each_error_code_is_on_the_page_with_what_the_code_says_of_it() {
    let rows = page::book("reference/errors.md").rows("Error codes");
    let named: Vec<&str> = rows.iter().map(|row| code(&row[0])[0]).collect();
    let known = ErrorCode::ALL.map(ErrorCode::code);
    assert_eq!(named, known);
    for (row, error) in rows.iter().zip(ErrorCode::ALL) {
        let name = error.code();
        assert_eq!(row[1], error.status().to_string(), "{name}");
        assert_eq!(code(&row[2]), [error.kind()], "{name}");
        assert_eq!(row[3], if error.has_retry_after() { "yes" } else { "" }, "{name}");
        if row[4] != "—" {
            assert_eq!(row[4], words(remedy(error.status(), Some(name))), "{name}");
        }
    }
}
