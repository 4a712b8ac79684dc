//! `manuals FOLDER`: manual pages and shell completions of the four commands, made from their command lines, in the
//! folders where a system has them: `FOLDER/COMMAND/share/...`, one tree a command, as each goes into another package.

use std::fs;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

use baton_integration::cli;
use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

fn main() -> Result<(), Error> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let folder =
        folder.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "usage: manuals FOLDER"))?;
    for command in [
        baton_router::cli::Cli::command(),
        baton_workerd::cli::Args::command(),
        cli::Up::command(),
        cli::Client::command(),
    ] {
        write(command, &folder)?;
    }
    Ok(())
}

fn write(mut command: Command, folder: &Path) -> Result<(), Error> {
    let name = command.get_name().to_owned();
    let share = folder.join(&name).join("share");
    let manual = share.join("man/man1");
    fs::create_dir_all(&manual)?;
    let mut page = Vec::new();
    let codes = "0 well, 1 failed while running, 2 wrong usage, 78 wrong configuration.";
    let man = Man::new(command.clone()).manual("Baton").section("1");
    man.render(&mut page)?;
    page.extend_from_slice(format!(".SH \"EXIT STATUS\"\n{codes}\n").as_bytes());
    fs::write(manual.join(format!("{name}.1")), page)?;
    for (shell, below) in [
        (Shell::Bash, "bash-completion/completions"),
        (Shell::Zsh, "zsh/vendor-completions"),
        (Shell::Fish, "fish/vendor_completions.d"),
    ] {
        let completions = share.join(below);
        fs::create_dir_all(&completions)?;
        let made = generate_to(shell, &mut command, &name, &completions)?;
        if shell == Shell::Bash {
            // Bash looks for the bare name.
            fs::rename(made, completions.join(&name))?;
        }
    }
    Ok(())
}
