# bash completion for rmgradient, made by docs/make_pages.py

_rmgradient() {
    local word=${COMP_WORDS[COMP_CWORD]} option= first=$((COMP_CWORD + 1)) i
    COMPREPLY=()
    compopt -o default -o bashdefault 2> /dev/null  # without a reply, the shell completes files, and quotes them
    for ((i = COMP_CWORD - 1; i > 0; i--)); do
        if [[ ${COMP_WORDS[i]} == -[a-z]* || ${COMP_WORDS[i]} == --* ]]; then
            option=${COMP_WORDS[i]} first=$((i + 1))
            break
        fi
    done
    if [[ ${COMP_WORDS[first]} == '=' ]]; then first=$((first + 1)); fi  # --sky=gray is three words
    if [[ $word == '=' ]]; then word=; first=$COMP_CWORD; fi
    if [[ $word != -* ]]; then
        case $option in
            -i|--input) return ;;
        esac
        if ((COMP_CWORD == first)); then
            case $option in
                -o|--output|-b|--background|--save-points|--preview|--report|-f|--points-file|--mask|--reference) return ;;
                -m|--smooth) compopt +o default +o bashdefault 2> /dev/null
                    COMPREPLY=($(compgen -W 'auto' -- "$word")); return ;;
                --sky) compopt +o default +o bashdefault 2> /dev/null
                    COMPREPLY=($(compgen -W 'gray color darkest' -- "$word")); return ;;
                -c|--compress|-s|--sigma|-r|--rows|--white) compopt +o default +o bashdefault 2> /dev/null; return ;;
            esac
        fi
    fi
    compopt +o default +o bashdefault 2> /dev/null
    COMPREPLY=($(compgen -W '-i --input -o --output -b --background -c --compress --save-points --preview --report --overwrite -p --points -f --points-file -a --auto --edit -s --sigma -m --smooth -r --rows --mask --reference --divide --stretch --white --sky --dither -q --quiet -v --verbose --version -h --help' -- "$word"))
}

complete -o default -o bashdefault -F _rmgradient rmgradient
