#include <stdio.h>

static int turned(int letter, int first) {
    return first + (letter - first + 13) % 26;
}

int main(void) {
    for (int letter; (letter = getchar()) != EOF;) {
        if (letter >= 'a' && letter <= 'z')
            letter = turned(letter, 'a');
        else if (letter >= 'A' && letter <= 'Z')
            letter = turned(letter, 'A');
        if (putchar(letter) == EOF)
            return 1;
    }
    return fflush(stdout) != 0 || ferror(stdin);
}
